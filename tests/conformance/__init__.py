"""Every property of every registered part, generated from the registry: a new part file is covered with no edit here.

`variants` says in which forms a kind is tried, `cases` makes tiny models of them, `checks` holds the properties.
"""
