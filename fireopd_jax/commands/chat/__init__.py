"""`fireopd chat`: talk to a model, or to two of them side by side.

lines of a terminal or a pipe -> reading -> messages -> Chat -> Speaker (session/) -> showing
                                         -> /commands -> slash -> Chat
"""
