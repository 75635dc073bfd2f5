"""From rows of the store to packed tokens, and the replay that training draws from."""
