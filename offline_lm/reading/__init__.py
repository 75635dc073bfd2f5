"""Text that teaches a small model to read: generated pages, goals and actions, with what is right about them.

Every word that matters is made up anew for each page, so that nothing can be learnt but how words relate: the same
here and there, one of several, less than, not, the third, still to do. No real log is in it, and nothing of `envs`.
"""
