"""Configuration of a hybrid language model: the config, its options, the registries and validation."""
