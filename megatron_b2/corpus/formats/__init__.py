"""Plain text from files of every kind: HTML, manual pages, Markdown, PDF, WARC and WET."""
