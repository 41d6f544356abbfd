"""nvila: serve and train NVILA visual language models. docs/data-path.md follows one video through this package."""
