"""A trained model as a folder that needs nothing of this package: ``peer_model.py`` reads it, or transformers does."""
