"""The training engine over DeepSpeed: everything here knows its insides, and nothing elsewhere does."""
