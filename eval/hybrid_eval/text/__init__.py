"""Long-context tasks in natural language, for models with a tokenizer.

Every sample comes from a generator seeded by (task, seed, length, depth, index), fills its stated
length to within one unit of filler (answer prefix and room for generation counted), and carries
its true token count.
"""
