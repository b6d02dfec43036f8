"""Expert computation: a naive oracle and the fast paths that are tested against it."""
