"""`bench routing`: which experts real text chooses, how unevenly, and what that does to ranks."""
