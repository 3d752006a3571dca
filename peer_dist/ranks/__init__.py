"""The processes of a run: who they are, how they meet, agree, watch each other and leave."""
