"""Words that prompts are made of where the user names no others."""

from __future__ import annotations

_LIST = """
able acid age air also apple arch area arm army art aunt baby back ball band bank base bath bear beat bed bell belt
bird bite blue boat body bone book born boss both bowl box boy bread brick bridge bring brown brush build burn bus
bush busy cake calm camp card care cart case cash cat cave chair chalk chat chin city clay clean clock cloth cloud
club coal coat cold cook cool copy corn cost cow crab crew crop cup dark date dawn day deal deep deer desk dirt
dish dog door down draw dream dress drink drop drum dry duck dust each ear earth east easy edge egg empty end even
eye face fact fair fall farm fast fear feed feel few field file fill fine fire fish flag flat floor flow fly fog
food foot fork form fox free fresh frog fruit full fun game gate gift girl give glad glass goat gold good grass
gray green ground grow guest hair half hall hand hard hat head heat help hen hill hold hole home honey hook hope
horn horse host hour house ice idea inch iron island jar job join joke juice jump keep key kind king kite knee
knot lake lamp land large last late lead leaf left leg lemon lend level lid life light line lion list live lock
long look loud love low luck lunch map mark mask meal meat meet melt milk mind mine mint mix moon more moss most
moth mouse move mud music nail name near neck need nest net new night noise north nose note nurse oak oil old
open orange oven owl own page paint pair palm pan paper park part path pea pen pick pie pig pin pink pipe plan
plant plate play plum pond pool poor post pot pull pump pure push queen quick quiet rain ramp read real red rest
rice rich ride ring ripe rise river road rock roll roof room root rope rose round row rug run sad safe sail salt
same sand save sea seat seed sell send shape sheep ship shirt shoe shop short show side sign silk sing sink skin
sky sleep slow small smile smoke snow soap soft soil song soon soup south spoon spot star stay stem step stone
stop storm story street strong sugar sun sweet swim table tail talk tall tame tape taste tea team tent test thick
thin time tin tiny toe tone tooth top town toy track train tray tree trip true tube turn twin uncle under use
valley vase very view village voice wait walk wall want warm wash watch water wave way weak well west wet wheel
white wide wild wind wing winter wise wish wolf wood wool word work world yard year yellow young zebra zone
"""

WORDS: tuple[str, ...] = tuple(_LIST.split())
