"""`peer-dist report`: what is known of a run, as one page of HTML."""
