"""The recipes that come with loram, as package data (imported as `loram_recipes`)."""
