"""The proving ground: nasty storages, a model disk that knows what a crash may leave, stock tools to compare with."""
