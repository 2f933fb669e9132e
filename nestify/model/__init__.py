"""NestedModel: one set of weights, and one view of it per level."""
