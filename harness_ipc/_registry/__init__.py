"""Names, directories, private files, records, locks and process identities."""
