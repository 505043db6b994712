"""Other projects' files, read and written."""
