"""The miniature world: three families of short tasks whose answers are checked exactly.

It stands in for UltraFeedback where nothing can be downloaded. A family is a module with

    SOURCE                              its name
    draw(rng) -> truth                  one task; truth["prompt"] is the user's text
    demonstrate(truth, rng, slip)       one response, perfect at slip = 0
    ASPECTS                             aspect -> weight; the weights sum to 1
    aspects(truth, response)            aspect -> [0, 1]
    correct(truth, response)            the task's exact criterion

`world.py` joins the families, `python -m data_prep.miniature` writes them, and
`python -m data_prep.miniature.collect` scores a policy's answers into rows.
"""
