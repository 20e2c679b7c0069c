"""One paper a file: what is derived, how it is ranked, packed and forgotten."""
