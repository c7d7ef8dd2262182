"""What a run will do and the memory that it will take, before its first chunk."""
