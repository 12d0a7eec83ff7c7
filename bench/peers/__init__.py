"""What Headwater is measured against. Each module makes one kind of process; none of them uses sessions or servers of ours."""
