"""Other people's models, trained under the same conditions as the package's."""
