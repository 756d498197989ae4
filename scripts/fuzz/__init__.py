"""Damaged and hostile files, a module for each kind of them.

A kind is made once, with a folder for its sound files. Called with random numbers and an empty folder it damages a copy
there and reads it: it returns the name of the damage, or raises whatever the reader raises.
"""
