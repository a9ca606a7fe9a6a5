"""The sections of a config, one file each: the keys, and beside them the rules that hold between keys."""
