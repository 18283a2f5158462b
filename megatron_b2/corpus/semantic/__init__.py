"""Documents that say the same: clusters of dense features, and duplicates by meaning inside each cluster."""
