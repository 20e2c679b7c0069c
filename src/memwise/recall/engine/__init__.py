"""The mechanisms behind recall: time, text, extraction, embedding, storage, search and packing."""
