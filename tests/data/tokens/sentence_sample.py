"""Sentences labelled by hand, in the kinds of prose that break splitters. `|` marks where a sentence ends; it is not part of the text."""

SAMPLE: dict[str, list[str]] = {
    "plain": [
        "The ferry was late again.| Nobody on the quay seemed to mind.| We bought two coffees and waited.|",
        "Is it open on Sundays?| Yes!| Bring the children.|",
        "She counted the boxes twice. |There were nineteen of them.|".replace(". |", ".| "),
        "It rained, then it stopped; the match went on.| Nobody scored.|",
        "The roof leaks.| The landlord knows.| He has promised to come on Thursday.|",
    ],
    "abbreviations": [
        "Dr. Alvarez met Mrs. Okafor at St. Mary's on Friday.| They spoke for an hour.|",
        "The firm, i.e. Halden Bros. of Leeds, was sold in Feb. 1987.| Prices rose.|",
        "Bring salt, oil, vinegar, etc. and a knife.| We start at 7 p.m. on the dot.|",
        "Prof. J. R. Whitcombe et al. repeated the trial.| See Fig. 4 and Eq. 2 for the fit.|",
        "He left the U.S. Navy in 1994.| She stayed in the U.S. until spring.|",
        "They moved to Washington, D.C. The house was small.|".replace("D.C. The", "D.C.| The"),
        "Lt. Col. Brandt and Sgt. Yusuf signed at 9 a.m.| The others came later.|",
        "The verdict in Marsh vs. Ridley was read aloud.| No one spoke.|",
        "Approx. 40 guests came, incl. the mayor.| The band played until two.|",
        "Gov. Hale thanked Rep. Ito, Sen. Moss and Gen. Pratt.| It took a while.|",
        "See vol. 3, pp. 21 ff. for a proof.| It is short.|",
        "The answer is no. 7 on the list.| The other answer is no.| Ask again.|",
    ],
    "numbers": [
        "The rate fell from 3.75 to 3.5 percent.| Analysts had expected 3.6.|",
        "It cost $1,299.99 in May.| By June it was $899.|",
        "Version 2.10.4 fixes it.| Version 2.11 does not.|",
        "Chapter 4.2 has the proof.| The lemma is on page 18.|",
        "1. Wash the rice.|\n2. Boil the water.|\n3. Wait.|",
        "The score was 6.4 vs. 5.9 on average.| That settled it.|",
    ],
    "addresses": [
        "Write to ana.silva@mail.example.org or see www.example.org/faq.html for more.| Calls are free.|",
        "The code is at https://git.example.com/a/b.git?ref=v1.2 and builds.| Try it.|",
        "Open config.yaml in the root.| Then run setup.py once.|",
        "He uses Node.js and ASP.NET at work.| At home he uses nothing.|",
        "Yahoo! was founded in 1994.| It still exists.|",
    ],
    "quotes": [
        "“Where is it?” asked Tom.| “I left it here.”| He pointed at the shelf.|",
        '"Stop!" she cried, and ran.| The dog ran too.|',
        "He said, 'I will not go.'| Then he went.|",
        "(The museum is closed on Mondays.)| We went on Tuesday.|",
        "She wrote “never again.”| It was the last letter.|",
        "The sign read “Closed.” on both sides.| We knocked.|",
        "Why did he say “yes”?| Nobody knows.|",
        "He added a note [see below].| It was short.[3]| We read it.|",
    ],
    "ellipsis": [
        "I thought... no, never mind.| Go on.|",
        "They waited…| Nothing came.|",
        "And then . . . silence.|",
        "What?!| You cannot be serious...| Of course you can.|",
        "Well... maybe.| We shall see.|",
    ],
    "layout": [
        "The Long Winter|\n\nIt began in October.| The lake froze early.|",
        "A first line that is\nwrapped in the middle.| Then another.|",
        "First paragraph ends here.|\n\nSecond one starts.|",
        "Contact|\n\nHarbour Street 5|\n\nOpen daily from nine.|",
    ],
    "other scripts": [
        "今日は雨です。|傘を持ってください。|ありがとう！|",
        "你好吗？|我很好。|谢谢！|",
        "यह एक वाक्य है।| यह दूसरा है।|",
        "هل أنت بخير؟| نعم، شكرا.|",
        "¿Dónde está la estación?| ¡Corre!| El tren sale a las 5.30.|",
        "Das kostet z.B. 3,50 Euro.| Am 3. Mai ist Schluss.|",
        "M. Dupont habite à Lyon.| Il travaille chez Mme. Roux.|",
        "Он приехал в 2004 г. из Москвы.| Его никто не ждал.|",
        "Τι ώρα είναι;| Είναι πέντε.|",
        "Το σπίτι είναι μικρό.| Μου αρέσει.|",
        "Ես գնացի տուն։| Նա մնաց։|",
        "အိမ်ပြန်မယ်။| နေကောင်းလား။|",
        "እንደምን ነህ።| ደህና ነኝ።|",
    ],
}


def labelled() -> list[tuple[str, str, set[int]]]:
    """(kind, text, indices of the last characters of its sentences) of every entry."""
    found = []
    for kind, entries in SAMPLE.items():
        for entry in entries:
            ends, text = set(), ""
            for piece in entry.split("|"):
                text += piece
                ends.add(len(text) - 1)
            # What follows the last mark is no sentence.
            if not entry.endswith("|"):
                ends.discard(len(text) - 1)
            found.append((kind, text, ends))
    return found
