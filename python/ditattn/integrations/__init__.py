"""ditattn inside other people's libraries: one module per library, which is imported only with its module here."""
