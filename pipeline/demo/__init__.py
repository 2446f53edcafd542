"""The demo: a tree in three levels of user namespaces moves between two hosts made on this machine.

``host`` is process 1 of a host, ``hosts`` speaks to it, ``tree`` is the program that
moves, ``client`` asks its web server all the while, ``scene`` puts the stage up and
takes it down, ``show`` tells the story.
"""
