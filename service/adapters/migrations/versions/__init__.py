"""The migrations, each named by its number: revisions follow each other in one line."""
