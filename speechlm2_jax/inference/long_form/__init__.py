"""Long recordings: they are cut into chunks, whose texts are joined."""
