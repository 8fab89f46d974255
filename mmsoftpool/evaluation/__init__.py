"""Is one model better than the other, and is a submission to COCO's server sound?"""
