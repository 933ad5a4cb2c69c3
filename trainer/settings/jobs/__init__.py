"""Job files of other training programs, translated to our inputs.

`translation` is what all have in common; each other file is one program. A job means here what it
means there: a key that is missing has the default of its program.
"""
