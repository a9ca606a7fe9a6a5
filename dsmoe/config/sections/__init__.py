"""Sections of a config, one file each: the keys, and the rules between keys."""
