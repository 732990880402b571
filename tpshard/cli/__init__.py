"""The command line: one file for each command. Commands parse, call and render; nothing here decides."""
