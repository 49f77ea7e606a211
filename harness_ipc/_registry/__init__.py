"""Names, directories, private files, records, locks, processes: what a daemon leaves in file system and process table."""
