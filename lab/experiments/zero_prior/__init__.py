"""Does a zero prior help? A fresh word against words that have meant something already.

The same images are learned under four words that differ in nothing else: the class word that
fits, a word with a strong wrong prior, a rare string, and a placeholder whose embedding starts
next to zero and is trained along.
"""
