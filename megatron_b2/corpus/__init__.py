"""Raw text to clean text: for now, real multilingual text from Debian packages (`b2 corpus fetch`)."""
