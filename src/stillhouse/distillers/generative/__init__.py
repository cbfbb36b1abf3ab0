"""Networks that make images: how a teacher of many steps is trained, and how it becomes a student of few."""
