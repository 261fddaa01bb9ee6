"""From files to token ids: rows, what is rendered of them, what is learned of that, and where it is kept."""
