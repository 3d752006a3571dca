"""The processes of a run: how they learn their rank, meet, agree, watch each other and leave."""
