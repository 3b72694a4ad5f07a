"""Pictures as files of a few bytes: code indices by range coding; docs/files.md has the format."""
