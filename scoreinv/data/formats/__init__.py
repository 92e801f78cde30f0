"""One module per kind of file. Each returns plain arrays; `readers` turns them into data."""
