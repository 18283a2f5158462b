"""The stages of the pipeline, in the order of the report's figure 2; each is usable alone."""
