"""Files that somebody might send, opened as a user would: refused, or shown as text. None runs, reaches or writes anything."""
