"""What a config costs, and which configs cost the same: arithmetic alone, before anything is built."""
