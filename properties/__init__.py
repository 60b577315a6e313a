"""Default values, meaning, range and search space of every configuration key, as YAML files."""
