"""How strong an edit is: the KL on neutral text, and the search for a strength."""
