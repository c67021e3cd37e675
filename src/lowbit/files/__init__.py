"""What lowbit asks of the file system: names that are taken once, names that are claimed, files that are only files."""
