"""What a teacher has said, kept on disk: how its numbers are kept (`storage`), where (`answers`), and who answers with them (`teacher`)."""
